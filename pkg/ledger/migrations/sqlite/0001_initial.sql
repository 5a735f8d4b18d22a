-- The laws are told in the package documentation of ledger. Triggers raise
-- instead of ignoring, so that a bug is an error and not a silent no-op.

CREATE TABLE claims (
	request_id       BLOB    NOT NULL PRIMARY KEY CHECK (length(request_id) = 32),
	backend          TEXT    NOT NULL,
	content_hash     BLOB    NOT NULL CHECK (length(content_hash) = 32),
	owner            TEXT    NOT NULL,
	valid_to         INTEGER NOT NULL,
	created_at       INTEGER NOT NULL,
	record           BLOB    NOT NULL,
	sealed_key       BLOB,
	login_public_key TEXT    NOT NULL,
	-- When the final log was stored; null while the grant lives.
	ended_at         INTEGER
) STRICT, WITHOUT ROWID;

-- The living are few among all that ever were; this keeps listing them cheap.
CREATE INDEX claims_live ON claims (request_id) WHERE ended_at IS NULL;

CREATE TRIGGER claims_content_is_fixed BEFORE UPDATE ON claims
WHEN NEW.request_id IS NOT OLD.request_id OR NEW.content_hash IS NOT OLD.content_hash
	OR NEW.owner IS NOT OLD.owner OR NEW.valid_to IS NOT OLD.valid_to
	OR NEW.created_at IS NOT OLD.created_at OR NEW.record IS NOT OLD.record
BEGIN
	SELECT RAISE(ABORT, 'claims: content never changes');
END;

CREATE TRIGGER claims_key_is_set_once BEFORE UPDATE ON claims
WHEN OLD.sealed_key IS NOT NULL
	AND (NEW.sealed_key IS NOT OLD.sealed_key OR NEW.login_public_key IS NOT OLD.login_public_key)
BEGIN
	SELECT RAISE(ABORT, 'claims: a sealed key never changes');
END;

CREATE TRIGGER claims_end_is_final BEFORE UPDATE ON claims
WHEN OLD.ended_at IS NOT NULL
	AND (NEW.ended_at IS NOT OLD.ended_at OR NEW.backend IS NOT OLD.backend)
BEGIN
	SELECT RAISE(ABORT, 'claims: an ended claim does not move or live again');
END;

CREATE TABLE intents (
	request_id   BLOB    NOT NULL CHECK (length(request_id) = 32),
	attempt      INTEGER NOT NULL CHECK (attempt BETWEEN 1 AND 4294967295),
	content_hash BLOB    NOT NULL CHECK (length(content_hash) = 32),
	params       BLOB    NOT NULL,
	placement    TEXT    NOT NULL,
	state        TEXT    NOT NULL CHECK (state IN ('open', 'gone')),
	created_at   INTEGER NOT NULL,
	gone_at      INTEGER,
	PRIMARY KEY (request_id, attempt),
	CHECK ((state = 'gone') = (gone_at IS NOT NULL))
) STRICT, WITHOUT ROWID;

-- One attempt at a time.
CREATE UNIQUE INDEX intents_open ON intents (request_id) WHERE state = 'open';

CREATE TABLE closures (
	request_id BLOB    NOT NULL PRIMARY KEY CHECK (length(request_id) = 32),
	reason     TEXT    NOT NULL,
	closed_by  TEXT    NOT NULL,
	closed_at  INTEGER NOT NULL
) STRICT, WITHOUT ROWID;

CREATE TRIGGER closures_never_change BEFORE UPDATE ON closures
BEGIN
	SELECT RAISE(ABORT, 'closures: never changed');
END;

CREATE TRIGGER closures_never_go BEFORE DELETE ON closures
BEGIN
	SELECT RAISE(ABORT, 'closures: never removed');
END;

CREATE TABLE compute_logs (
	request_id BLOB    NOT NULL CHECK (length(request_id) = 32),
	kind       TEXT    NOT NULL CHECK (kind IN ('interim', 'final')),
	sequence   INTEGER NOT NULL CHECK (sequence >= 0),
	body       BLOB    NOT NULL,
	key_id     TEXT    NOT NULL,
	logged_at  INTEGER NOT NULL,
	PRIMARY KEY (request_id, kind)
) STRICT, WITHOUT ROWID;

CREATE INDEX compute_logs_final ON compute_logs (logged_at, request_id) WHERE kind = 'final';

CREATE TRIGGER compute_logs_final_is_immutable BEFORE UPDATE ON compute_logs
WHEN OLD.kind = 'final' OR NEW.kind IS NOT OLD.kind OR NEW.request_id IS NOT OLD.request_id
BEGIN
	SELECT RAISE(ABORT, 'compute_logs: a final log never changes');
END;

CREATE TRIGGER compute_logs_final_stays BEFORE DELETE ON compute_logs
WHEN OLD.kind = 'final'
BEGIN
	SELECT RAISE(ABORT, 'compute_logs: a final log is never removed');
END;

CREATE TRIGGER compute_logs_interim_grows BEFORE UPDATE ON compute_logs
WHEN NEW.sequence <= OLD.sequence
BEGIN
	SELECT RAISE(ABORT, 'compute_logs: the sequence only grows');
END;

CREATE TRIGGER compute_logs_no_interim_after_final_update BEFORE UPDATE ON compute_logs
WHEN NEW.kind = 'interim' AND EXISTS (
	SELECT 1 FROM compute_logs WHERE request_id = NEW.request_id AND kind = 'final')
BEGIN
	SELECT RAISE(ABORT, 'compute_logs: no interim log after the final one');
END;

CREATE TRIGGER compute_logs_no_interim_after_final_insert BEFORE INSERT ON compute_logs
WHEN NEW.kind = 'interim' AND EXISTS (
	SELECT 1 FROM compute_logs WHERE request_id = NEW.request_id AND kind = 'final')
BEGIN
	SELECT RAISE(ABORT, 'compute_logs: no interim log after the final one');
END;

CREATE TRIGGER intents_none_after_the_end BEFORE INSERT ON intents
WHEN EXISTS (SELECT 1 FROM closures WHERE request_id = NEW.request_id)
	OR EXISTS (SELECT 1 FROM compute_logs WHERE request_id = NEW.request_id AND kind = 'final')
BEGIN
	SELECT RAISE(ABORT, 'intents: the grant is closed');
END;

CREATE TRIGGER intents_are_numbered BEFORE INSERT ON intents
WHEN NEW.attempt <> 1 + (SELECT COALESCE(MAX(attempt), 0) FROM intents WHERE request_id = NEW.request_id)
BEGIN
	SELECT RAISE(ABORT, 'intents: attempts are numbered without gaps');
END;

CREATE TRIGGER intents_only_go BEFORE UPDATE ON intents
WHEN OLD.state = 'gone' OR NEW.request_id IS NOT OLD.request_id OR NEW.attempt IS NOT OLD.attempt
	OR NEW.content_hash IS NOT OLD.content_hash OR NEW.params IS NOT OLD.params
	OR NEW.placement IS NOT OLD.placement OR NEW.created_at IS NOT OLD.created_at
BEGIN
	SELECT RAISE(ABORT, 'intents: an attempt only goes from open to gone');
END;

CREATE TRIGGER intents_stay BEFORE DELETE ON intents
BEGIN
	SELECT RAISE(ABORT, 'intents: never removed');
END;

CREATE TABLE instances (
	request_id BLOB    NOT NULL CHECK (length(request_id) = 32),
	attempt    INTEGER NOT NULL CHECK (attempt BETWEEN 1 AND 4294967295),
	body       BLOB    NOT NULL,
	ready_at   INTEGER NOT NULL,
	PRIMARY KEY (request_id, attempt)
) STRICT, WITHOUT ROWID;

CREATE TRIGGER instances_never_change BEFORE UPDATE ON instances
BEGIN
	SELECT RAISE(ABORT, 'instances: never changed');
END;
