package ec2backend

import (
	"strings"
	"testing"

	"github.com/compute-bridge/compute-bridge/pkg/backenderr"
	"github.com/compute-bridge/compute-bridge/test/cloudsim/ec2sim"
)

func TestAnImageIsFoundInThreeWays(t *testing.T) {
	t.Parallel()
	_, c := simulated(t, ec2sim.Options{})
	newest := func(arch string) string {
		var found ec2sim.Image
		for _, i := range ec2sim.DefaultImages(testRegion) {
			if strings.HasPrefix(i.Name, "debian-13-"+arch) && i.Created.After(found.Created) {
				found = i
			}
		}
		return found.ID
	}
	for _, test := range []struct {
		name, arch, want string
		image            ImageConfig
	}{
		{"parameter", archAMD64, newest(archAMD64), ImageConfig{SSMParameter: ec2sim.ParameterDebian13, SSMParameterARM64: ec2sim.ParameterDebian13ARM64}},
		{"parameter for arm64", archARM64, newest(archARM64), ImageConfig{SSMParameter: ec2sim.ParameterDebian13, SSMParameterARM64: ec2sim.ParameterDebian13ARM64}},
		{"owner and name", archAMD64, newest(archAMD64), ImageConfig{Owner: ec2sim.OwnerDebian, Name: "debian-13-*"}},
		{"owner and name for arm64", archARM64, newest(archARM64), ImageConfig{Owner: ec2sim.OwnerDebian, Name: "debian-13-*"}},
		{"id", archAMD64, newest(archAMD64), ImageConfig{ID: newest(archAMD64)}},
	} {
		c.Regions[0].Image = test.image
		got, err := newImages(c, openClients(t, c)).resolve(t.Context(), testRegion, test.arch)
		want := machineImage{ID: test.want, RootDevice: "/dev/xvda", Architecture: test.arch, MinDiskGiB: 8}
		if err != nil || got != want {
			t.Errorf("by %s: %+v, %v; want %+v", test.name, got, err, want)
		}
	}
}

func TestAnImageThatIsNotThereIsNamedByItsKey(t *testing.T) {
	t.Parallel()
	_, c := simulated(t, ec2sim.Options{})
	var arm string
	for _, i := range ec2sim.DefaultImages(testRegion) {
		if i.Architecture == "arm64" {
			arm = i.ID
		}
	}
	for _, test := range []struct {
		says  string
		image ImageConfig
	}{
		{"image.ssm_parameter: there is no parameter /none", ImageConfig{SSMParameter: "/none"}},
		{"image.name: there is no such image", ImageConfig{Owner: ec2sim.OwnerDebian, Name: "windows-*"}},
		{"image.name: there is no such image", ImageConfig{Owner: ec2sim.OwnerCanonical, Name: "debian-13-*"}},
		{"image.id: InvalidAMIID.NotFound", ImageConfig{ID: "ami-0123456789abcdef0"}},
		{"image.id: image " + arm + " is for arm64, not for x86_64", ImageConfig{ID: arm}},
	} {
		c.Regions[0].Image = test.image
		_, err := newImages(c, openClients(t, c)).resolve(t.Context(), testRegion, archAMD64)
		if !backenderr.Is(err, backenderr.GrantNotSatisfiable) || !strings.Contains(err.Error(), "region eu-central-1: "+test.says) {
			t.Errorf("%v; want %q", err, test.says)
		}
	}
}

func TestAnImageIsLookedUpOnceAnHour(t *testing.T) {
	t.Parallel()
	cloud, c := simulated(t, ec2sim.Options{})
	all := newImages(c, openClients(t, c))
	look := func() {
		t.Helper()
		if _, err := all.resolve(t.Context(), testRegion, archAMD64); err != nil {
			t.Fatal(err)
		}
	}
	look()
	cloud.ForgetRequests()
	look()
	if n := len(cloud.Requests()); n != 0 {
		t.Errorf("the second look asked %d times", n)
	}
	all.forget(testRegion)
	look()
	if n := len(cloud.Requests()); n != 2 {
		t.Errorf("after it was forgotten: %d requests, want one for the parameter and one for the image", n)
	}
	for key, known := range all.known {
		known.at = known.at.Add(-imageAge)
		all.known[key] = known
	}
	cloud.ForgetRequests()
	look()
	if n := len(cloud.Requests()); n != 2 {
		t.Errorf("after an hour: %d requests, want 2", n)
	}
}

func TestARightThatIsLackingIsNoMissingImage(t *testing.T) {
	t.Parallel()
	for _, right := range []string{"ssm:GetParameter", "ec2:DescribeImages"} {
		cloud, c := simulated(t, ec2sim.Options{})
		cloud.Deny(right)
		_, err := newImages(c, openClients(t, c)).resolve(t.Context(), testRegion, archAMD64)
		if !backenderr.Is(err, backenderr.ProviderDenied) {
			t.Errorf("without %s: %v", right, err)
		}
	}
}
