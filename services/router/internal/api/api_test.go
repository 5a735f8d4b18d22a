package api_test

import (
	"encoding/hex"
	"testing"

	"github.com/compute-bridge/compute-bridge/services/router/internal/api"
)

// Others compute the digest, too: it must never change.
func TestDigestOfTheBackendSet(t *testing.T) {
	for _, c := range []struct {
		names []string
		want  string
	}{
		{nil, "a6f87f7ac312117730d9b7c293d0f33dbc22c918f422fe3c5b97c462b0ac77ce"},
		{[]string{"metal", "site/aws"}, "06452551a54e8f00b9c8a5f156353eeb73ffd50a804ab4356dd8d33bacf1a766"},
		{[]string{"site/aws", "metal"}, "f01d96baceffe062b8df8c8a81d6add0b6f7afe616efc097dc363d0275130b77"},
		{[]string{"metalsite/aws"}, "d9654926742d7e4ddfe2e954a87e23a565718a407cb36171763a04f9f146d16b"},
	} {
		if got := hex.EncodeToString(api.Digest(c.names)); got != c.want {
			t.Errorf("digest of %q is %s, want %s", c.names, got, c.want)
		}
	}
}
