"""Drives a simulated cloud through boto3, every action and the errors that the
AWS worker tells apart, and holds each answer to botocore's own models: no element
that the model doesn't know, no value of another type, nothing required missing.

    boto3_check.py <url> <url of one that throttles> <url of one that denies>
        <url of one whose clock is ahead> <access key id> <secret access key>

The clouds are prepared by the test that runs this: see TestBoto3Agrees.
"""

import base64
import datetime
import sys
import time
import xml.etree.ElementTree

import boto3
import botocore.auth
import botocore.awsrequest
import botocore.credentials
import botocore.httpsession
import botocore.parsers
import botocore.validate
import cbor2
from botocore.config import Config
from botocore.exceptions import ClientError

URL, THROTTLED, DENYING, AHEAD, KEY, SECRET = sys.argv[1:]
HOME = "eu-central-1"
GRANT = "ab" * 32

failures = []


def fail(what):
    failures.append(what)


# What the service answers since, and Debian's model of 2022 doesn't know.
NEWER = {
    "CreateSecurityGroupResult": {"securityGroupArn"},
    "SecurityGroup": {"securityGroupArn"},
    "DeleteSecurityGroupResult": {"return", "groupId"},
}
NEWER_VALUES = {"BootModeValues": {"uefi-preferred"}}
# New types of instances come every month.
OPEN_ENUMS = {"InstanceType"}


def walk_xml(element, shape, path):
    """Looks for elements that the model doesn't have, and values of other types."""
    kind = shape.type_name
    if kind == "structure":
        known = {
            member.serialization.get("name", name): member
            for name, member in shape.members.items()
        }
        for child in element:
            name = child.tag.split("}")[-1]
            if name in NEWER.get(shape.name, ()):
                continue
            if name not in known:
                fail(f"{path}: {shape.name} has no {name}")
                continue
            walk_xml(child, known[name], f"{path}.{name}")
    elif kind == "list":
        item = shape.member.serialization.get("name", "member")
        for child in element:
            name = child.tag.split("}")[-1]
            if name != item:
                fail(f"{path}: an item is called {name}, not {item}")
            walk_xml(child, shape.member, f"{path}[]")
    else:
        if len(element):
            fail(f"{path}: elements where a {kind} should be")
        value = element.text or ""
        if kind == "boolean" and value not in ("true", "false"):
            fail(f"{path}: {value!r} is no boolean")
        enum = getattr(shape, "enum", None) if kind == "string" else None
        if enum and shape.name not in OPEN_ENUMS and value not in {*enum, *NEWER_VALUES.get(shape.name, ())}:
            fail(f"{path}: {value!r} is no {shape.name}")


parse = botocore.parsers.ResponseParser.parse


def checked_parse(self, response, shape):
    parsed = parse(self, response, shape)
    if response["status_code"] >= 300 or shape is None:
        return parsed
    # Everything that the model calls required, and types.
    plain = {k: v for k, v in parsed.items() if k != "ResponseMetadata"}
    report = botocore.validate.ParamValidator().validate(plain, shape)
    if report.has_errors():
        fail(f"{shape.name}: {report.generate_report()}")
    body = response["body"]
    if body.lstrip().startswith(b"<"):
        root = xml.etree.ElementTree.fromstring(body)
        wrapper = shape.serialization.get("resultWrapper")
        top = root
        ids = {"requestId", "ResponseMetadata"}
        if wrapper:
            top = next(child for child in root if child.tag.endswith("}" + wrapper))
        copy = xml.etree.ElementTree.Element("top")
        copy.extend(c for c in top if c.tag.split("}")[-1] not in ids)
        walk_xml(copy, shape, shape.name)
    return parsed


botocore.parsers.ResponseParser.parse = checked_parse


def client(service, region=HOME, key=KEY, url=URL):
    return boto3.client(
        service,
        region_name=region,
        endpoint_url=url,
        aws_access_key_id=key,
        aws_secret_access_key=SECRET,
        config=Config(retries={"total_max_attempts": 1}),
    )


def expect(code, call, **params):
    """Wants an error code; its status must be one that botocore takes for an error."""
    try:
        call(**params)
    except ClientError as error:
        got = error.response["Error"]["Code"]
        if got != code:
            fail(f"{error.operation_name}({params}): {got}, want {code}")
        if not error.response["ResponseMetadata"].get("RequestId"):
            fail(f"{error.operation_name}: {got} has no request id")
    else:
        fail(f"{call.__name__}({params}) succeeded, want {code}")


def want(what, got, wanted):
    if got != wanted:
        fail(f"{what}: {got!r}, want {wanted!r}")


def until(what, happened):
    end = time.monotonic() + 10
    while not happened():
        if time.monotonic() > end:
            sys.exit(f"not in 10 s: {what}")
        time.sleep(0.01)


ec2, far, sts, ssm = client("ec2"), client("ec2", "us-east-1"), client("sts"), client("ssm")
scheduler, cloudwatch = client("scheduler"), client("cloudwatch")

# Who we are.
want("account", sts.get_caller_identity()["Account"], "123456789012")
stranger = "AKIASOMEBODYELSE0000"
expect("AuthFailure", client("ec2", key=stranger).describe_vpcs)
expect("InvalidClientTokenId", client("sts", key=stranger).get_caller_identity)
expect("UnrecognizedClientException", client("ssm", key=stranger).get_parameter, Name="x")
expect("UnrecognizedClientException", client("scheduler", key=stranger).list_schedules)

# Images, types and places.
image = ssm.get_parameter(Name="/aws/service/debian/release/13/latest/amd64")["Parameter"]["Value"]
expect("ParameterNotFound", ssm.get_parameter, Name="/aws/service/nothing")
want("image", ec2.describe_images(ImageIds=[image])["Images"][0]["RootDeviceName"], "/dev/xvda")
expect("InvalidAMIID.NotFound", ec2.describe_images, ImageIds=["ami-00000000000000000"])
names = [
    t["InstanceType"]
    for page in ec2.get_paginator("describe_instance_types").paginate(
        Filters=[{"Name": "instance-type", "Values": ["t3.*"]}], PaginationConfig={"PageSize": 5}
    )
    for t in page["InstanceTypes"]
]
want("types", len(set(names)), 7)
expect("InvalidInstanceType", ec2.describe_instance_types, InstanceTypes=["m9z.huge"])
offerings = ec2.describe_instance_type_offerings(
    LocationType="availability-zone", Filters=[{"Name": "instance-type", "Values": ["c7i.4xlarge"]}]
)["InstanceTypeOfferings"]
want("offerings", [o["Location"] for o in offerings], ["eu-central-1a", "eu-central-1b"])
vpc = ec2.describe_vpcs(Filters=[{"Name": "is-default", "Values": ["true"]}])["Vpcs"][0]["VpcId"]
subnets = ec2.describe_subnets(Filters=[{"Name": "default-for-az", "Values": ["true"]}])["Subnets"]
want("subnets", [s["AvailabilityZone"] for s in subnets], ["eu-central-1a", "eu-central-1b", "eu-central-1c"])
expect("InvalidSubnetID.NotFound", ec2.describe_subnets, SubnetIds=["subnet-00000000"])
lists = ec2.describe_managed_prefix_lists()["PrefixLists"]
entries = ec2.get_managed_prefix_list_entries(PrefixListId=lists[0]["PrefixListId"])["Entries"]
want("entries", bool(entries[0]["Cidr"]), True)
expect("InvalidPrefixListID.NotFound", ec2.get_managed_prefix_list_entries, PrefixListId="pl-0")

# Security groups.
group = ec2.create_security_group(
    GroupName="cb-b-1", Description="of a test", VpcId=vpc,
    TagSpecifications=[{"ResourceType": "security-group", "Tags": [{"Key": "compute-bridge:bridge", "Value": "b"}]}],
)["GroupId"]
expect("InvalidGroup.Duplicate", ec2.create_security_group, GroupName="cb-b-1", Description="of a test")
rules = [
    {"IpProtocol": "tcp", "FromPort": 22, "ToPort": 22, "IpRanges": [{"CidrIp": "0.0.0.0/0", "Description": "ssh"}],
     "Ipv6Ranges": [{"CidrIpv6": "::/0"}]},
    {"IpProtocol": "udp", "FromPort": 53, "ToPort": 53, "UserIdGroupPairs": [{"GroupId": group}],
     "PrefixListIds": [{"PrefixListId": lists[0]["PrefixListId"]}]},
]
made = ec2.authorize_security_group_ingress(GroupId=group, IpPermissions=rules)["SecurityGroupRules"]
want("rules", len(made), 4)
expect("InvalidPermission.Duplicate", ec2.authorize_security_group_ingress, GroupId=group, IpPermissions=rules[:1])
everything = [{"IpProtocol": "-1", "IpRanges": [{"CidrIp": "0.0.0.0/0"}]}]
want("revoked", ec2.revoke_security_group_egress(GroupId=group, IpPermissions=everything)["Return"], True)
expect("InvalidPermission.NotFound", ec2.revoke_security_group_egress, GroupId=group, IpPermissions=everything)
expect("RulesPerSecurityGroupLimitExceeded", ec2.authorize_security_group_egress, GroupId=group, IpPermissions=[
    {"IpProtocol": "tcp", "FromPort": port, "ToPort": port, "IpRanges": [{"CidrIp": "10.0.0.0/8"}]} for port in range(1, 62)])
ec2.authorize_security_group_egress(
    GroupId=group, IpPermissions=[{"IpProtocol": "tcp", "FromPort": 443, "ToPort": 443, "IpRanges": [{"CidrIp": "10.0.0.0/8"}]}]
)
found = ec2.describe_security_groups(Filters=[{"Name": "tag:compute-bridge:bridge", "Values": ["b"]}])["SecurityGroups"][0]
want("ingress", {p["IpProtocol"]: p["FromPort"] for p in found["IpPermissions"]}, {"tcp": 22, "udp": 53})
want("egress", found["IpPermissionsEgress"][0]["IpRanges"], [{"CidrIp": "10.0.0.0/8"}])
expect("InvalidGroup.NotFound", ec2.describe_security_groups, GroupIds=["sg-00000000000000000"])

# An instance as the worker orders one.
tags = [{"Key": "compute-bridge:grant", "Value": GRANT}, {"Key": "compute-bridge:bridge", "Value": "b"}]


def order(**changes):
    wanted = {
        "ImageId": image, "InstanceType": "t3.micro", "MinCount": 1, "MaxCount": 1, "ClientToken": "token",
        "UserData": "#cloud-config\n", "InstanceInitiatedShutdownBehavior": "terminate",
        "MetadataOptions": {"HttpTokens": "required", "HttpPutResponseHopLimit": 1, "HttpEndpoint": "enabled"},
        "BlockDeviceMappings": [{"DeviceName": "/dev/xvda", "Ebs": {
            "VolumeSize": 20, "VolumeType": "gp3", "Encrypted": True, "DeleteOnTermination": True}}],
        "NetworkInterfaces": [{"DeviceIndex": 0, "SubnetId": subnets[0]["SubnetId"], "Groups": [group],
                               "AssociatePublicIpAddress": True, "DeleteOnTermination": True}],
        "TagSpecifications": [{"ResourceType": kind, "Tags": tags} for kind in ("instance", "volume", "network-interface")],
    }
    wanted.update(changes)
    return {k: v for k, v in wanted.items() if v is not None}


expect("DryRunOperation", ec2.run_instances, DryRun=True, **order())
expect("InvalidParameterValue", ec2.run_instances, **order(UserData="x" * (16 * 1024 + 1)))
expect("InvalidParameterValue", ec2.run_instances, **order(InstanceType="t4g.micro"))
expect("InvalidAMIID.NotFound", ec2.run_instances, **order(ImageId="ami-00000000000000000"))
expect("UnknownParameter", ec2.run_instances, **order(KeyName="k"))
expect("InvalidBlockDeviceMapping", ec2.run_instances,
       **order(BlockDeviceMappings=[{"DeviceName": "/dev/xvda", "Ebs": {"VolumeSize": 1}}]))
instance = ec2.run_instances(**order())["Instances"][0]["InstanceId"]
want("the same token", ec2.run_instances(**order())["Instances"][0]["InstanceId"], instance)
expect("IdempotentParameterMismatch", ec2.run_instances, **order(InstanceType="t3.small"))


def show(id, client=ec2):
    return client.describe_instances(InstanceIds=[id])["Reservations"][0]["Instances"][0]


def state(id, client=ec2):
    return show(id, client)["State"]["Name"]


# Not found, for a moment.
expect("InvalidInstanceID.NotFound", ec2.describe_instances, InstanceIds=[instance])
time.sleep(0.3)
until("running", lambda: state(instance) == "running")
i = show(instance)
want("address", i["PublicIpAddress"], "127.0.0.9")
want("tokens", i["MetadataOptions"]["HttpTokens"], "required")
want("tags", sorted(i["Tags"], key=lambda t: t["Key"]), sorted(tags, key=lambda t: t["Key"]))
mine = [{"Name": "tag:compute-bridge:grant", "Values": [GRANT]}]
pages = ec2.get_paginator("describe_instances").paginate(Filters=mine, PaginationConfig={"PageSize": 5})
want("filtered", [r["Instances"][0]["InstanceId"] for p in pages for r in p["Reservations"]], [instance])
expect("InvalidParameterValue", ec2.describe_instances, Filters=[{"Name": "colour", "Values": ["x"]}])
expect("InvalidInstanceID.Malformed", ec2.describe_instances, InstanceIds=["i-1"])
volume = ec2.describe_volumes(Filters=mine)["Volumes"][0]
want("volume", (volume["Encrypted"], volume["Size"], volume["Attachments"][0]["InstanceId"]), (True, 20, instance))
nic = ec2.describe_network_interfaces(Filters=mine)["NetworkInterfaces"][0]
want("interface", (nic["Association"]["PublicIp"], nic["Attachment"]["InstanceId"]), ("127.0.0.9", instance))
console = ec2.get_console_output(InstanceId=instance, Latest=True)["Output"]
# boto3 has decoded it already.
want("console", console.startswith("booted " + instance), True)
ec2.create_tags(Resources=[instance, volume["VolumeId"]], Tags=[{"Key": "k", "Value": "v"}])
want("tagged", {"Key": "k", "Value": "v"} in show(instance)["Tags"], True)
expect("DependencyViolation", ec2.delete_security_group, GroupId=group)
expect("VolumeInUse", ec2.delete_volume, VolumeId=volume["VolumeId"])
expect("InvalidNetworkInterface.InUse", ec2.delete_network_interface, NetworkInterfaceId=nic["NetworkInterfaceId"])

# Figures.
now = datetime.datetime.now(datetime.timezone.utc)
query = {
    "StartTime": now - datetime.timedelta(hours=1), "EndTime": now + datetime.timedelta(hours=1),
    "MetricDataQueries": [{"Id": "m0", "MetricStat": {"Period": 60, "Stat": "Average", "Metric": {
        "Namespace": "AWS/EC2", "MetricName": "CPUUtilization", "Dimensions": [{"Name": "InstanceId", "Value": instance}]}}}],
}
until("figures", lambda: cloudwatch.get_metric_data(**query)["MetricDataResults"][0]["Values"])
want("figures", set(cloudwatch.get_metric_data(**query)["MetricDataResults"][0]["Values"]), {25.0})
expect("InvalidNextToken", cloudwatch.get_metric_data, NextToken="?", **query)


# The same in the protocol that newer clients choose and Debian's doesn't know yet:
# by botocore's signature and model, and cbor2's reading.
# https://smithy.io/2.0/additional-specs/protocols/smithy-rpc-v2.html
def in_cbor(url=URL, **params):
    body = cbor2.dumps(params, datetime_as_timestamp=True)
    request = botocore.awsrequest.AWSRequest(
        "POST", url + "/service/GraniteServiceVersion20100801/operation/GetMetricData", data=body,
        headers={"Smithy-Protocol": "rpc-v2-cbor", "Content-Type": "application/cbor", "Accept": "application/cbor"},
    )
    botocore.auth.SigV4Auth(botocore.credentials.Credentials(KEY, SECRET), "monitoring", HOME).add_auth(request)
    answer = botocore.httpsession.URLLib3Session().send(request.prepare())
    for header, wanted in (("Smithy-Protocol", "rpc-v2-cbor"), ("Content-Type", "application/cbor")):
        want(header, answer.headers.get(header), wanted)
    return answer, cbor2.loads(answer.content)


answer, told = in_cbor(**query)
shape = cloudwatch.meta.service_model.operation_model("GetMetricData").output_shape
report = botocore.validate.ParamValidator().validate(told, shape)
want("what the model doesn't allow", report.generate_report(), "")
want("members that the model doesn't have", set(told) - set(shape.members), set())
result = shape.members["MetricDataResults"].member
want("and within", {k for r in told["MetricDataResults"] for k in r} - set(result.members), set())
want("times", {type(at) for at in told["MetricDataResults"][0]["Timestamps"]}, {datetime.datetime})
want("figures in CBOR", (answer.status_code, set(told["MetricDataResults"][0]["Values"])), (200, {25.0}))
for url, params, status, code in (
    (URL, {"NextToken": "?"}, 400, "InvalidNextToken"),
    (DENYING, {}, 403, "AccessDenied"),
    (AHEAD, {}, 403, "SignatureDoesNotMatch"),
):
    answer, told = in_cbor(url, **query, **params)
    want("a refusal in CBOR", (answer.status_code, told["__type"].split("#")[-1]), (status, code))
    # So that clients find the code of the older protocol.
    want("of the older protocol", answer.headers["X-Amzn-Query-Error"], code + ";Sender")
    want("with words", bool(told["message"]), True)

# Schedules. Debian's model has no ActionAfterCompletion yet.
at = (now + datetime.timedelta(hours=1)).strftime("at(%Y-%m-%dT%H:%M:%S)")
plan = {
    "Name": "cb-1", "ScheduleExpression": at, "FlexibleTimeWindow": {"Mode": "OFF"},
    "Target": {"Arn": "arn:aws:scheduler:::aws-sdk:ec2:terminateInstances",
               "RoleArn": "arn:aws:iam::123456789012:role/scheduler", "Input": '{"InstanceIds":["%s"]}' % instance},
}
scheduler.create_schedule(**plan)
expect("ConflictException", scheduler.create_schedule, **plan)
expect("ResourceNotFoundException", scheduler.create_schedule, **{**plan, "Name": "cb-2", "GroupName": "nobodys"})
expect("ValidationException", scheduler.create_schedule, **{**plan, "Name": "cb-2", "ScheduleExpression": "at(noon)"})
want("schedule", scheduler.get_schedule(Name="cb-1")["Target"]["Input"], plan["Target"]["Input"])
want("schedules", [s["Name"] for s in scheduler.list_schedules(NamePrefix="cb-")["Schedules"]], ["cb-1"])
scheduler.delete_schedule(Name="cb-1")
expect("ResourceNotFoundException", scheduler.delete_schedule, Name="cb-1")

# The end.
expect("DryRunOperation", ec2.terminate_instances, DryRun=True, InstanceIds=[instance])
expect("InvalidInstanceID.NotFound", ec2.terminate_instances, InstanceIds=[instance, "i-00000000000000000"])
change = ec2.terminate_instances(InstanceIds=[instance])["TerminatingInstances"][0]
want("change", (change["PreviousState"]["Name"], change["CurrentState"]["Name"]), ("running", "shutting-down"))
until("terminated", lambda: state(instance) == "terminated")
want("reason", show(instance)["StateReason"]["Code"], "Client.UserInitiatedShutdown")
expect("IdempotentInstanceTerminated", ec2.run_instances, **order())
until("no volume", lambda: not ec2.describe_volumes(Filters=mine)["Volumes"])
want("no interface", ec2.describe_network_interfaces(Filters=mine)["NetworkInterfaces"], [])
want("deleted", ec2.delete_security_group(GroupId=group)["ResponseMetadata"]["HTTPStatusCode"], 200)
expect("InvalidGroup.NotFound", ec2.delete_security_group, GroupId=group)

# What is left when an instance doesn't take its parts along.
keep = ec2.run_instances(**order(
    ClientToken="kept", NetworkInterfaces=[{"DeviceIndex": 0, "DeleteOnTermination": False}],
    BlockDeviceMappings=[{"DeviceName": "/dev/xvda", "Ebs": {"VolumeSize": 20, "DeleteOnTermination": False}}],
))["Instances"][0]["InstanceId"]
time.sleep(0.3)
ec2.terminate_instances(InstanceIds=[keep])
until("terminated", lambda: state(keep) == "terminated")
until("available", lambda: ec2.describe_volumes(Filters=mine)["Volumes"][0]["State"] == "available")
ec2.delete_volume(VolumeId=ec2.describe_volumes(Filters=mine)["Volumes"][0]["VolumeId"])
ec2.delete_network_interface(
    NetworkInterfaceId=ec2.describe_network_interfaces(Filters=mine)["NetworkInterfaces"][0]["NetworkInterfaceId"])
expect("InvalidVolume.NotFound", ec2.delete_volume, VolumeId=volume["VolumeId"])
expect("InvalidNetworkInterfaceID.NotFound", ec2.delete_network_interface, NetworkInterfaceId=nic["NetworkInterfaceId"])

# The other region lacks what it was made to lack.
far_image = client("ssm", "us-east-1").get_parameter(Name="/aws/service/debian/release/13/latest/amd64")["Parameter"]["Value"]
plain = {"ImageId": far_image, "NetworkInterfaces": None, "ClientToken": None}
zone = {"Placement": {"AvailabilityZone": "us-east-1b"}}
expect("InsufficientInstanceCapacity", far.run_instances, **order(InstanceType="m7i.large", **zone, **plain))
expect("VcpuLimitExceeded", far.run_instances, **order(InstanceType="m7i.4xlarge", **plain))
spot = {"InstanceMarketOptions": {"MarketType": "spot"}}
expect("MaxSpotInstanceCountExceeded", far.run_instances, **order(InstanceType="m7i.xlarge", **spot, **plain))
expect("Unsupported", ec2.run_instances,
       **order(InstanceType="c7i.4xlarge", ClientToken=None, NetworkInterfaces=None, Placement={"AvailabilityZone": "eu-central-1c"}))
late = far.run_instances(**order(InstanceType="c7i.large", **plain))["Instances"][0]["InstanceId"]
time.sleep(0.3)
until("terminated", lambda: state(late, far) == "terminated")
want("late reason", show(late, far)["StateReason"]["Code"], "Server.InsufficientInstanceCapacity")
expect("UnauthorizedOperation", far.delete_volume, VolumeId=volume["VolumeId"])
expect("InvalidAction", far.describe_addresses)
expect("InternalError", far.describe_vpcs)


# What every service may say to any call, each in its own protocol.
def calls(url):
    services = {name: client(name, url=url) for name in ("ec2", "sts", "ssm", "scheduler", "cloudwatch")}
    return {
        "ec2": (services["ec2"].describe_vpcs, {}),
        "sts": (services["sts"].get_caller_identity, {}),
        "ssm": (services["ssm"].get_parameter, {"Name": "x"}),
        "scheduler": (services["scheduler"].list_schedules, {}),
        "cloudwatch": (services["cloudwatch"].get_metric_data, query),
    }


for url, codes in (
    (DENYING, {"ec2": "UnauthorizedOperation", "sts": "AccessDenied", "ssm": "AccessDeniedException",
               "scheduler": "AccessDeniedException", "cloudwatch": "AccessDenied"}),
    (AHEAD, {"ec2": "RequestExpired", "sts": "SignatureDoesNotMatch", "ssm": "InvalidSignatureException",
             "scheduler": "InvalidSignatureException", "cloudwatch": "SignatureDoesNotMatch"}),
):
    for service, (call, params) in calls(url).items():
        expect(codes[service], call, **params)

# And too many requests, at last.
hurried = client("ec2", url=THROTTLED)


def hurry():
    for _ in range(1000):
        hurried.run_instances(**order(ClientToken=None, NetworkInterfaces=None))


expect("RequestLimitExceeded", hurry)

for failure in failures:
    print(failure)
sys.exit(1 if failures else 0)
