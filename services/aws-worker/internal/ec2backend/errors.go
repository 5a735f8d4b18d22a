package ec2backend

import "github.com/compute-bridge/compute-bridge/pkg/backenderr"

func classify(err error, doing string) *backenderr.Error      { panic("soon") }
func codeOf(err error) string                                 { panic("soon") }
func isCapacity(code string) bool                             { panic("soon") }
func stateReasonError(code, message string) *backenderr.Error { panic("soon") }
func refused(err error) bool                                  { panic("soon") }
func notFound(err error) bool                                 { panic("soon") }
