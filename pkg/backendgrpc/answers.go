package backendgrpc

import (
	"bytes"
	"strings"

	"google.golang.org/protobuf/proto"

	"github.com/compute-bridge/compute-bridge/pkg/backend"
	bridgev1 "github.com/compute-bridge/compute-bridge/proto/gen/go/computebridge/v1"
)

// Checks of what a backend answers. An answer that is about another grant, or
// that can't be true, is not passed on; what exists is unknown then.

// maxHandle is how long a handle may be for the contract's calls.
const maxHandle = 512

// wrongAnswer says what is wrong with a backend's answer for a grant, "" if
// nothing. Neither is an answer right that nobody can log in by without trust on
// first use.
func wrongAnswer(id backend.GrantID, p backend.Provisioned) string {
	switch wrong := wrongInstance(id, p.Instance); {
	case wrong != "":
		return wrong
	case p.Receipt.GrantID != id:
		return "the receipt of another grant"
	case p.Receipt.HostKey == "":
		return "a receipt without a host key"
	}
	return ""
}

// wrongInstance says what is wrong with the instance of a grant.
func wrongInstance(id backend.GrantID, i backend.Instance) string {
	switch named, err := i.Handle.GrantID(); {
	case err != nil:
		return "a handle that names no grant"
	case named != id:
		return "the handle of another grant"
	case !validPath(i.Handle):
		return "a handle whose path leads nowhere"
	case i.GrantID != id:
		return "the instance of another grant"
	}
	if _, known := bridgev1.InstanceState_name[int32(i.State)]; !known || i.State == 0 {
		return "an instance in a state that there is not"
	}
	return ""
}

// validPath reports whether a router can follow the path of a handle, with its
// own name before it.
func validPath(h backend.Handle) bool {
	if len(h) > maxHandle || strings.Count(string(h), "/") >= backend.MaxHops {
		return false
	}
	for name, rest, routed := h.Split(); routed; name, rest, routed = rest.Split() {
		if !backend.ValidName(name) {
			return false
		}
	}
	return true
}

// wrongEvent says what is wrong with an event of a watch of handle.
func wrongEvent(handle backend.Handle, e *bridgev1.WatchUntilExitResponse) string {
	switch event := e.GetEvent().(type) {
	case *bridgev1.WatchUntilExitResponse_Instance:
		id, err := handle.GrantID()
		if err != nil {
			return "" // The backend, which refuses such a handle, knows better.
		}
		return wrongInstance(id, InstanceFromProto(event.Instance))
	case *bridgev1.WatchUntilExitResponse_Usage:
		return wrongLog(handle, event.Usage)
	case *bridgev1.WatchUntilExitResponse_ComputeLog:
		return wrongLog(handle, event.ComputeLog)
	}
	return ""
}

// wrongLog says what is wrong with a compute log, if there is one, for handle.
// Whoever reads the log reads what was signed, so that must be of the grant, too.
func wrongLog(handle backend.Handle, l *bridgev1.SignedComputeLog) string {
	id, err := handle.GrantID()
	if err != nil || l == nil {
		return ""
	}
	if !bytes.Equal(l.GetLog().GetRequestId(), id[:]) {
		return "the compute log of another grant"
	}
	signed := &bridgev1.ComputeLog{}
	if err := proto.Unmarshal(l.GetBody(), signed); err != nil {
		return "a compute log that can't be read"
	}
	if !bytes.Equal(signed.GetRequestId(), id[:]) {
		return "a compute log that is signed for another grant"
	}
	return ""
}
