"""Reads the errors of a simulated cloud through boto3: for each name of a service on
standard input makes a call to it, and prints the status, the code and the message
with which it was refused.

    boto3_errors.py <url> <access key id> <secret access key>
"""

import datetime
import sys

import boto3
from botocore.config import Config
from botocore.exceptions import ClientError

URL, KEY, SECRET = sys.argv[1:]
NOW = datetime.datetime.now(datetime.timezone.utc)


def client(service):
    return boto3.client(
        service,
        region_name="eu-central-1",
        endpoint_url=URL,
        aws_access_key_id=KEY,
        aws_secret_access_key=SECRET,
        config=Config(retries={"total_max_attempts": 1}),
    )


ec2, sts, ssm, scheduler, cloudwatch = map(client, ("ec2", "sts", "ssm", "scheduler", "cloudwatch"))
CALLS = {
    "ec2": lambda: ec2.run_instances(MinCount=1, MaxCount=1),
    "sts": sts.get_caller_identity,
    "ssm": lambda: ssm.get_parameter(Name="/x"),
    "scheduler": lambda: scheduler.get_schedule(Name="x"),
    "cloudwatch": lambda: cloudwatch.get_metric_data(
        StartTime=NOW - datetime.timedelta(hours=1), EndTime=NOW, MetricDataQueries=[{"Id": "m0"}]
    ),
}

for line in sys.stdin:
    try:
        CALLS[line.strip()]()
    except ClientError as error:
        status = error.response["ResponseMetadata"]["HTTPStatusCode"]
        print(status, error.response["Error"]["Code"], error.response["Error"]["Message"], flush=True)
    else:
        print("it succeeded", flush=True)
