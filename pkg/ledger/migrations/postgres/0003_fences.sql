-- Placements of a claim are numbered, and calls that were refused stay refused.

-- Grows with each placement of the claim.
ALTER TABLE claims ADD COLUMN generation BIGINT NOT NULL DEFAULT 1 CHECK (generation >= 1);

CREATE FUNCTION ledger_generations() RETURNS TRIGGER LANGUAGE plpgsql
SET search_path FROM CURRENT AS $$
BEGIN
	IF NEW.generation < OLD.generation THEN
		PERFORM ledger_refuse('claims: a generation never shrinks');
	END IF;
	RETURN NEW;
END $$;

-- After claims_laws, which takes the lock: triggers run in the order of their
-- names.
CREATE TRIGGER claims_laws_of_generations BEFORE UPDATE ON claims FOR EACH ROW EXECUTE FUNCTION ledger_generations();

-- Calls with a fence up to this one were refused, or may be: they get nothing.
CREATE TABLE fences (
	request_id BYTEA  NOT NULL PRIMARY KEY CHECK (octet_length(request_id) = 32),
	refused    BIGINT NOT NULL CHECK (refused >= 1)
);

CREATE FUNCTION ledger_fences() RETURNS TRIGGER LANGUAGE plpgsql
SET search_path FROM CURRENT AS $$
BEGIN
	IF TG_OP = 'DELETE' THEN
		PERFORM ledger_refuse('fences: never removed');
	END IF;
	PERFORM ledger_lock(NEW.request_id);
	IF TG_OP = 'UPDATE' AND (NEW.refused < OLD.refused OR NEW.request_id IS DISTINCT FROM OLD.request_id) THEN
		PERFORM ledger_refuse('fences: what was refused stays refused');
	END IF;
	RETURN NEW;
END $$;

CREATE TRIGGER fences_laws BEFORE INSERT OR UPDATE OR DELETE ON fences FOR EACH ROW EXECUTE FUNCTION ledger_fences();

CREATE TRIGGER fences_stay BEFORE TRUNCATE ON fences FOR EACH STATEMENT EXECUTE FUNCTION ledger_no_truncate();
