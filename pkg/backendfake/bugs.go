package backendfake

// Bug is a way in which a [Driver] breaks a law of the bridge. A test suite
// that doesn't notice it is no good.
type Bug string

// The bugs.
const (
	// BugNoUndo: a failed attempt is left as it is.
	BugNoUndo Bug = "no undo"
	// BugSaysNone: a failed attempt is left as it is, and the error says that
	// nothing exists.
	BugSaysNone Bug = "says none"
	// BugSecondInstance: after a restart, a retry makes a second instance in
	// place of adopting the first.
	BugSecondInstance Bug = "second instance"
	// BugNoReservation: grants that come at once get the same room.
	BugNoReservation Bug = "no reservation"
	// BugForgetsReservations: a restart forgets what is taken.
	BugForgetsReservations Bug = "forgets reservations"
	// BugFreesAll: the end of one grant frees the room of all.
	BugFreesAll Bug = "frees all"
	// BugEarlyGone: a delete that was accepted counts as done.
	BugEarlyGone Bug = "early gone"
	// BugBlind: a provider that can't be read counts as empty.
	BugBlind Bug = "blind"
	// BugLosesUsage: what was used is deleted unread.
	BugLosesUsage Bug = "loses usage"
	// BugCreateFirst: an attempt is sent before it is on record.
	BugCreateFirst Bug = "create first"
	// BugGoneFirst: an attempt is on record as gone before it is deleted.
	BugGoneFirst Bug = "gone first"
	// BugNewToken: a create that is sent again has another name and token.
	BugNewToken Bug = "new token"
	// BugEveryBridge: what other bridges have counts as the bridge's own.
	BugEveryBridge Bug = "every bridge"
	// BugResumes: an attempt whose undoing was cut off is taken up again.
	BugResumes Bug = "resumes"
	// BugNoCheck: nobody looks for the grant's closure right before a create.
	BugNoCheck Bug = "no check"
	// BugArmsLate: an instance gets its deadline only once it is ready.
	BugArmsLate Bug = "arms late"
	// BugEndsAgain: what has ended is said to have ended just now, each time that
	// it is asked for.
	BugEndsAgain Bug = "ends again"
)
