package labvm

import (
	"cmp"
	"crypto/rand"
	"crypto/sha256"
	"encoding/hex"
	"encoding/json"
	"fmt"
	"io"
	"maps"
	"net/http"
	"regexp"
	"runtime"
	"slices"
	"strconv"
	"strings"
	"sync"
	"time"

	"github.com/compute-bridge/compute-bridge/test/cloudsim"
	"github.com/compute-bridge/compute-bridge/test/lab"
)

// The headers of IMDSv2, and its bound on a token's life.
// https://docs.aws.amazon.com/AWSEC2/latest/UserGuide/configuring-instance-metadata-service.html
const (
	tokenHeader = "X-Aws-Ec2-Metadata-Token"
	ttlHeader   = "X-Aws-Ec2-Metadata-Token-Ttl-Seconds"
	maxTTL      = 21600
)

// imds is the metadata service of one machine: version 2 only.
type imds struct {
	files map[string]string // by path below the version
	now   func() time.Time

	mu     sync.Mutex
	tokens map[string]time.Time // until when
}

// newIMDS returns the service of a machine.
func newIMDS(boot cloudsim.Boot, l *lab.Lab, host *lab.Host, now func() time.Time) *imds {
	return &imds{
		files: metadataFiles(boot, host.Addr.String(), host.MAC().String(), l.Prefix().String()),
		now:   now, tokens: map[string]time.Time{},
	}
}

// metadataFiles is the tree that the service shows: what every instance has, and
// what the simulator knows of this one.
func metadataFiles(boot cloudsim.Boot, ip, mac, network string) map[string]string {
	meta := map[string]string{
		"ami-id": boot.Image, "ami-launch-index": "0", "instance-action": "none", "instance-id": boot.ID,
		"instance-life-cycle": "on-demand", "instance-type": "t3.micro", "mac": mac,
		"local-hostname": "ip-" + strings.ReplaceAll(ip, ".", "-"), "local-ipv4": ip, "public-ipv4": ip,
		"placement/availability-zone": "eu-central-1a", "placement/region": "eu-central-1",
		"reservation-id": "r-" + hostUUID(boot.ID)[:8] + "0", "security-groups": "default",
		"services/domain": "amazonaws.com", "services/partition": "aws",
	}
	meta["hostname"] = meta["local-hostname"]
	for path, value := range map[string]string{
		"device-number": "0", "interface-id": "eni-" + hostUUID(boot.ID)[:8], "local-hostname": meta["local-hostname"],
		"local-ipv4s": ip, "public-ipv4s": ip, "mac": mac, "owner-id": "123456789012",
		"security-groups": "default", "subnet-ipv4-cidr-block": network, "vpc-ipv4-cidr-block": network,
		"vpc-ipv4-cidr-blocks": network,
	} {
		meta["network/interfaces/macs/"+mac+"/"+path] = value
	}
	maps.Copy(meta, boot.Metadata)
	document, err := json.MarshalIndent(map[string]string{
		"accountId":        meta["network/interfaces/macs/"+mac+"/owner-id"],
		"architecture":     cmp.Or(boot.Architecture, map[string]string{"amd64": "x86_64"}[runtime.GOARCH], runtime.GOARCH),
		"availabilityZone": meta["placement/availability-zone"], "imageId": boot.Image, "instanceId": boot.ID,
		"instanceType": meta["instance-type"], "privateIp": ip, "region": meta["placement/region"], "version": "2017-09-30",
	}, "", "  ")
	if err != nil {
		panic(err) // strings can be encoded
	}
	files := map[string]string{"dynamic/instance-identity/document": string(document)}
	for path, value := range meta {
		files["meta-data/"+strings.Trim(path, "/")] = value
	}
	if len(boot.UserData) > 0 {
		files["user-data"] = string(boot.UserData)
	}
	return files
}

// ServeHTTP implements [http.Handler].
func (s *imds) ServeHTTP(w http.ResponseWriter, r *http.Request) {
	path, ok := strings.CutPrefix(r.URL.Path, "/")
	if !ok {
		http.Error(w, "Bad Request", http.StatusBadRequest)
		return
	}
	switch {
	case path == "latest/api/token" && r.Method == http.MethodPut:
		s.giveToken(w, r)
	case path == "latest/api/token" || r.Method != http.MethodGet && r.Method != http.MethodHead:
		w.WriteHeader(http.StatusMethodNotAllowed)
	case !s.allowed(r.Header.Get(tokenHeader)):
		w.WriteHeader(http.StatusUnauthorized)
	default:
		version, below, _ := strings.Cut(path, "/")
		text, found := s.read(below)
		if !regexp.MustCompile(`^(latest|2\d\d\d-\d\d-\d\d)$`).MatchString(version) || !found {
			http.NotFound(w, r)
			return
		}
		w.Header().Set("Content-Type", "text/plain")
		_, _ = io.WriteString(w, text) // the client may have gone
	}
}

// giveToken answers a request for a token.
func (s *imds) giveToken(w http.ResponseWriter, r *http.Request) {
	seconds, err := strconv.Atoi(r.Header.Get(ttlHeader))
	if err != nil || seconds < 1 || seconds > maxTTL {
		http.Error(w, "Bad Request", http.StatusBadRequest)
		return
	}
	if r.Header.Get("X-Forwarded-For") != "" {
		w.WriteHeader(http.StatusForbidden)
		return
	}
	token := rand.Text()
	s.mu.Lock()
	s.tokens[token] = s.now().Add(time.Duration(seconds) * time.Second)
	s.mu.Unlock()
	w.Header().Set(ttlHeader, strconv.Itoa(seconds))
	_, _ = io.WriteString(w, token) // the client may have gone
}

// allowed tells whether a token is good now.
func (s *imds) allowed(token string) bool {
	s.mu.Lock()
	defer s.mu.Unlock()
	until, ok := s.tokens[token]
	return ok && s.now().Before(until)
}

// read returns a file, or the listing of a directory, in which directories end in a
// slash.
func (s *imds) read(path string) (string, bool) {
	if text, ok := s.files[path]; ok {
		return text, true
	}
	path = strings.Trim(path, "/")
	if path != "" {
		path += "/"
	}
	entries := map[string]struct{}{}
	for file := range s.files {
		if below, ok := strings.CutPrefix(file, path); ok {
			entry, _, isDir := strings.Cut(below, "/")
			if isDir {
				entry += "/"
			}
			entries[entry] = struct{}{}
		}
	}
	return strings.Join(slices.Sorted(maps.Keys(entries)), "\n"), len(entries) > 0
}

// hostUUID is a UUID that belongs to an instance.
func hostUUID(id string) string {
	sum := sha256.Sum256([]byte(id))
	text := hex.EncodeToString(sum[:16])
	return fmt.Sprintf("%s-%s-%s-%s-%s", text[:8], text[8:12], text[12:16], text[16:20], text[20:32])
}
