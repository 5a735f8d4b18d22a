package ec2sim

import (
	"encoding/base64"
	"maps"
	"strings"
	"time"
)

// maxConsole is how much of a console is kept: the last of it.
const maxConsole = 64 << 10

func getConsoleOutput(q *call) effect {
	id := q.params.required("InstanceId")
	// Machines' consoles are read as they are, with or without it.
	q.params.boolean("Latest", false)
	return func() (any, *Error) {
		c := q.cloud
		c.mu.Lock()
		found, fault := c.find(q.region, []string{id})
		if fault != nil {
			c.mu.Unlock()
			return nil, fault
		}
		i := found[0]
		machine, console := i.machine, i.console
		c.mu.Unlock()
		if console == nil && machine != nil {
			console = machine.Console()
		}
		if len(console) > maxConsole {
			console = console[len(console)-maxConsole:]
		}
		return []element{
			text("instanceId", id), instant("timestamp", c.clock.Now().Truncate(time.Second)),
			optional("output", base64.StdEncoding.EncodeToString(console)),
		}, nil
	}
}

func createTags(q *call) effect {
	ids := q.params.list("ResourceId")
	tags := readTags(q.params)
	if len(ids) == 0 || len(tags) == 0 {
		q.params.fail(refusal("MissingParameter", "The request must contain the parameters ResourceId and Tag"))
	}
	return func() (any, *Error) {
		c, r := q.cloud, q.region
		c.mu.Lock()
		defer c.mu.Unlock()
		var all []map[string]string
		for _, id := range ids {
			have, fault := c.tagged(r, id)
			if fault != nil {
				return nil, fault
			}
			after := maps.Clone(have)
			maps.Copy(after, tags)
			if len(after) > maxTags {
				return nil, refusal("TagLimitExceeded", "The maximum number of Tags for a resource has been reached.")
			}
			all = append(all, have)
		}
		for _, have := range all {
			maps.Copy(have, tags)
		}
		return []element{boolean("return", true)}, nil
	}
}

// tagged finds the tags of a resource that can be seen. The caller holds mu.
func (c *Cloud) tagged(r *region, id string) (map[string]string, *Error) {
	now := c.clock.Now()
	kind, _, _ := strings.Cut(id, "-")
	switch kind {
	case "i":
		found, fault := c.find(r, []string{id})
		if fault != nil {
			return nil, fault
		}
		return found[0].Tags, nil
	case "vol":
		if v := r.volumes[id]; v != nil && !now.Before(v.visible) {
			return v.Tags, nil
		}
		return nil, volumeNotFound(id)
	case "eni":
		if n := r.interfaces[id]; n != nil && !now.Before(n.visible) {
			return n.Tags, nil
		}
		return nil, interfaceNotFound(id)
	case "sg":
		g, fault := c.seen(r, id)
		if fault != nil {
			return nil, fault
		}
		return g.Tags, nil
	default:
		return nil, refusal("InvalidID", "The ID '%s' is not valid", id)
	}
}

func volumeNotFound(id string) *Error {
	return refusal("InvalidVolume.NotFound", "The volume '%s' does not exist.", id)
}

func interfaceNotFound(id string) *Error {
	return refusal("InvalidNetworkInterfaceID.NotFound", "The networkInterface ID '%s' does not exist", id)
}

func deleteVolume(q *call) effect {
	id := q.params.required("VolumeId")
	return func() (any, *Error) {
		c, r := q.cloud, q.region
		c.mu.Lock()
		defer c.mu.Unlock()
		v := r.volumes[id]
		if v == nil || c.clock.Now().Before(v.visible) {
			return nil, volumeNotFound(id)
		}
		if v.instance != nil {
			return nil, refusal("VolumeInUse", "Volume %s is currently attached to %s", id, v.instance.ID)
		}
		delete(r.volumes, id)
		return []element{boolean("return", true)}, nil
	}
}

func deleteInterface(q *call) effect {
	id := q.params.required("NetworkInterfaceId")
	return func() (any, *Error) {
		c, r := q.cloud, q.region
		c.mu.Lock()
		defer c.mu.Unlock()
		n := r.interfaces[id]
		if n == nil || c.clock.Now().Before(n.visible) {
			return nil, interfaceNotFound(id)
		}
		if n.instance != nil {
			return nil, refusal("InvalidNetworkInterface.InUse", "Network interface '%s' is currently in use.", id)
		}
		delete(r.interfaces, id)
		return []element{boolean("return", true)}, nil
	}
}
