package ec2sim

import "fmt"

// LeaveParts has an instance's volumes and its interface stay behind when it
// ends, available, as they do when somebody changed that in the console. It fails
// if there is none.
func (c *Cloud) LeaveParts(id string) error {
	c.mu.Lock()
	defer c.mu.Unlock()
	i, _ := c.instance(id)
	if i == nil {
		return fmt.Errorf("no instance %q", id)
	}
	i.nic.stays = true
	for _, v := range i.disks {
		v.stays = true
	}
	return nil
}
