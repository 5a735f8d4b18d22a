package ec2backend

import "context"

func (c *clients) check(ctx context.Context) error   { panic("soon") }
func (c *clients) recheck(ctx context.Context) error { panic("soon") }
func (c *clients) problems() []string                { panic("soon") }
