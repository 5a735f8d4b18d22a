package telemetry

// The keys of log attributes. One thing has one key in every process, so that a
// grant can be followed from the router to the host.
const (
	KeyAddress    = "address"
	KeyAttempt    = "attempt"
	KeyBackend    = "backend"
	KeyBridgeID   = "bridge_id"
	KeyConfigPath = "config_path"
	KeyCreated    = "created"
	KeyDeadline   = "deadline"
	KeyElapsed    = "elapsed"
	KeyError      = "error"
	KeyGrantID    = "grant_id"
	KeyHost       = "host"
	KeyIdentity   = "identity"
	KeyImage      = "image"
	KeyInstanceID = "instance_id"
	KeyMethod     = "method"
	KeyReason     = "reason"
	KeyRegion     = "region"
	KeyService    = "service"
	KeySpanID     = "span_id"
	KeyState      = "state"
	KeyTraceID    = "trace_id"
	KeyVersion    = "version"
)
