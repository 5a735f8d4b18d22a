-- The laws are told in the package documentation of ledger. Triggers raise
-- instead of ignoring, so that a bug is an error and not a silent no-op.
--
-- Write transactions of one grant run one after the other: each holds
-- ledger_lock of the grant before it looks at anything. The triggers take it
-- too, so that a writer that knows nothing of it can't get between another's
-- look and write either.

CREATE FUNCTION ledger_lock(id BYTEA) RETURNS VOID LANGUAGE plpgsql AS $$
BEGIN
	-- With a snapshot from before the lock, a transaction would not see what the
	-- last holder wrote.
	IF current_setting('transaction_isolation') <> 'read committed' THEN
		RAISE EXCEPTION 'ledger: write transactions must be read committed'
			USING ERRCODE = 'integrity_constraint_violation';
	END IF;
	-- A commit waits for the disk, whatever the defaults of database or role: an
	-- intent must survive a power cut, because the create call that follows it
	-- does. What waits for a standby too stays as it is.
	IF current_setting('synchronous_commit') NOT IN ('on', 'remote_apply') THEN
		PERFORM set_config('synchronous_commit', 'on', true);
	END IF;
	PERFORM pg_advisory_xact_lock(hashtextextended(encode(id, 'hex'), 0));
END $$;

CREATE FUNCTION ledger_refuse(law TEXT) RETURNS VOID LANGUAGE plpgsql AS $$
BEGIN
	RAISE EXCEPTION '%', law USING ERRCODE = 'integrity_constraint_violation';
END $$;

CREATE FUNCTION ledger_no_truncate() RETURNS TRIGGER LANGUAGE plpgsql
SET search_path FROM CURRENT AS $$
BEGIN
	PERFORM ledger_refuse(TG_TABLE_NAME || ': never emptied');
	RETURN NULL;
END $$;

CREATE TABLE claims (
	request_id       BYTEA  NOT NULL PRIMARY KEY CHECK (octet_length(request_id) = 32),
	backend          TEXT   NOT NULL,
	content_hash     BYTEA  NOT NULL CHECK (octet_length(content_hash) = 32),
	owner            TEXT   NOT NULL,
	valid_to         BIGINT NOT NULL,
	created_at       BIGINT NOT NULL,
	record           BYTEA  NOT NULL,
	sealed_key       BYTEA,
	login_public_key TEXT   NOT NULL,
	-- When the final log was stored; null while the grant lives.
	ended_at         BIGINT
);

-- The living are few among all that ever were; this keeps listing them cheap.
CREATE INDEX claims_live ON claims (request_id) WHERE ended_at IS NULL;

CREATE FUNCTION ledger_claims() RETURNS TRIGGER LANGUAGE plpgsql
SET search_path FROM CURRENT AS $$
BEGIN
	PERFORM ledger_lock(NEW.request_id);
	IF TG_OP = 'INSERT' THEN
		RETURN NEW;
	END IF;
	IF (NEW.request_id, NEW.content_hash, NEW.owner, NEW.valid_to, NEW.created_at, NEW.record)
		IS DISTINCT FROM (OLD.request_id, OLD.content_hash, OLD.owner, OLD.valid_to, OLD.created_at, OLD.record) THEN
		PERFORM ledger_refuse('claims: content never changes');
	END IF;
	IF OLD.sealed_key IS NOT NULL
		AND (NEW.sealed_key, NEW.login_public_key) IS DISTINCT FROM (OLD.sealed_key, OLD.login_public_key) THEN
		PERFORM ledger_refuse('claims: a sealed key never changes');
	END IF;
	IF OLD.ended_at IS NOT NULL AND (NEW.ended_at, NEW.backend) IS DISTINCT FROM (OLD.ended_at, OLD.backend) THEN
		PERFORM ledger_refuse('claims: an ended claim does not move or live again');
	END IF;
	RETURN NEW;
END $$;

CREATE TRIGGER claims_laws BEFORE INSERT OR UPDATE ON claims FOR EACH ROW EXECUTE FUNCTION ledger_claims();

CREATE TABLE intents (
	request_id   BYTEA  NOT NULL CHECK (octet_length(request_id) = 32),
	attempt      BIGINT NOT NULL CHECK (attempt BETWEEN 1 AND 4294967295),
	content_hash BYTEA  NOT NULL CHECK (octet_length(content_hash) = 32),
	params       BYTEA  NOT NULL,
	placement    TEXT   NOT NULL,
	state        TEXT   NOT NULL CHECK (state IN ('open', 'gone')),
	created_at   BIGINT NOT NULL,
	gone_at      BIGINT,
	PRIMARY KEY (request_id, attempt),
	CHECK ((state = 'gone') = (gone_at IS NOT NULL))
);

-- One attempt at a time.
CREATE UNIQUE INDEX intents_open ON intents (request_id) WHERE state = 'open';

CREATE TABLE closures (
	request_id BYTEA  NOT NULL PRIMARY KEY CHECK (octet_length(request_id) = 32),
	reason     TEXT   NOT NULL,
	closed_by  TEXT   NOT NULL,
	closed_at  BIGINT NOT NULL
);

CREATE FUNCTION ledger_closures() RETURNS TRIGGER LANGUAGE plpgsql
SET search_path FROM CURRENT AS $$
BEGIN
	IF TG_OP <> 'INSERT' THEN
		PERFORM ledger_refuse('closures: never changed or removed');
	END IF;
	PERFORM ledger_lock(NEW.request_id);
	RETURN NEW;
END $$;

CREATE TRIGGER closures_laws BEFORE INSERT OR UPDATE OR DELETE ON closures
FOR EACH ROW EXECUTE FUNCTION ledger_closures();
CREATE TRIGGER closures_stay BEFORE TRUNCATE ON closures EXECUTE FUNCTION ledger_no_truncate();

CREATE TABLE compute_logs (
	request_id BYTEA  NOT NULL CHECK (octet_length(request_id) = 32),
	kind       TEXT   NOT NULL CHECK (kind IN ('interim', 'final')),
	sequence   BIGINT NOT NULL CHECK (sequence >= 0),
	body       BYTEA  NOT NULL,
	key_id     TEXT   NOT NULL,
	logged_at  BIGINT NOT NULL,
	PRIMARY KEY (request_id, kind)
);

CREATE INDEX compute_logs_final ON compute_logs (logged_at, request_id) WHERE kind = 'final';

CREATE FUNCTION ledger_compute_logs() RETURNS TRIGGER LANGUAGE plpgsql
SET search_path FROM CURRENT AS $$
BEGIN
	IF TG_OP = 'DELETE' THEN
		IF OLD.kind = 'final' THEN
			PERFORM ledger_refuse('compute_logs: a final log is never removed');
		END IF;
		RETURN OLD;
	END IF;
	PERFORM ledger_lock(NEW.request_id);
	IF TG_OP = 'UPDATE' THEN
		IF OLD.kind = 'final' OR (NEW.kind, NEW.request_id) IS DISTINCT FROM (OLD.kind, OLD.request_id) THEN
			PERFORM ledger_refuse('compute_logs: a final log never changes');
		END IF;
		IF NEW.sequence <= OLD.sequence THEN
			PERFORM ledger_refuse('compute_logs: the sequence only grows');
		END IF;
	END IF;
	IF NEW.kind = 'interim' AND EXISTS (
		SELECT 1 FROM compute_logs WHERE request_id = NEW.request_id AND kind = 'final') THEN
		PERFORM ledger_refuse('compute_logs: no interim log after the final one');
	END IF;
	RETURN NEW;
END $$;

CREATE TRIGGER compute_logs_laws BEFORE INSERT OR UPDATE OR DELETE ON compute_logs
FOR EACH ROW EXECUTE FUNCTION ledger_compute_logs();
CREATE TRIGGER compute_logs_stay BEFORE TRUNCATE ON compute_logs EXECUTE FUNCTION ledger_no_truncate();

CREATE FUNCTION ledger_intents() RETURNS TRIGGER LANGUAGE plpgsql
SET search_path FROM CURRENT AS $$
BEGIN
	IF TG_OP = 'DELETE' THEN
		PERFORM ledger_refuse('intents: never removed');
	END IF;
	PERFORM ledger_lock(NEW.request_id);
	IF TG_OP = 'INSERT' THEN
		IF EXISTS (SELECT 1 FROM closures WHERE request_id = NEW.request_id)
			OR EXISTS (SELECT 1 FROM compute_logs WHERE request_id = NEW.request_id AND kind = 'final') THEN
			PERFORM ledger_refuse('intents: the grant is closed');
		END IF;
		IF NEW.attempt <> 1 + (SELECT COALESCE(MAX(attempt), 0) FROM intents WHERE request_id = NEW.request_id) THEN
			PERFORM ledger_refuse('intents: attempts are numbered without gaps');
		END IF;
		RETURN NEW;
	END IF;
	IF OLD.state = 'gone'
		OR (NEW.request_id, NEW.attempt, NEW.content_hash, NEW.params, NEW.placement, NEW.created_at)
		IS DISTINCT FROM (OLD.request_id, OLD.attempt, OLD.content_hash, OLD.params, OLD.placement, OLD.created_at) THEN
		PERFORM ledger_refuse('intents: an attempt only goes from open to gone');
	END IF;
	RETURN NEW;
END $$;

CREATE TRIGGER intents_laws BEFORE INSERT OR UPDATE OR DELETE ON intents
FOR EACH ROW EXECUTE FUNCTION ledger_intents();
CREATE TRIGGER intents_stay BEFORE TRUNCATE ON intents EXECUTE FUNCTION ledger_no_truncate();

CREATE TABLE instances (
	request_id BYTEA  NOT NULL CHECK (octet_length(request_id) = 32),
	attempt    BIGINT NOT NULL CHECK (attempt BETWEEN 1 AND 4294967295),
	body       BYTEA  NOT NULL,
	ready_at   BIGINT NOT NULL,
	PRIMARY KEY (request_id, attempt)
);

CREATE FUNCTION ledger_instances() RETURNS TRIGGER LANGUAGE plpgsql
SET search_path FROM CURRENT AS $$
BEGIN
	IF TG_OP = 'UPDATE' THEN
		PERFORM ledger_refuse('instances: never changed');
	END IF;
	PERFORM ledger_lock(NEW.request_id);
	RETURN NEW;
END $$;

CREATE TRIGGER instances_laws BEFORE INSERT OR UPDATE ON instances
FOR EACH ROW EXECUTE FUNCTION ledger_instances();
