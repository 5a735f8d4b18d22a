-- Placements of a claim are numbered, and calls that were refused stay refused.

-- Grows with each placement of the claim.
ALTER TABLE claims ADD COLUMN generation INTEGER NOT NULL DEFAULT 1 CHECK (generation >= 1);

CREATE TRIGGER claims_generation_grows BEFORE UPDATE ON claims
WHEN NEW.generation < OLD.generation
BEGIN
	SELECT RAISE(ABORT, 'claims: a generation never shrinks');
END;

-- Calls with a fence up to this one were refused, or may be: they get nothing.
CREATE TABLE fences (
	request_id BLOB    NOT NULL PRIMARY KEY CHECK (length(request_id) = 32),
	refused    INTEGER NOT NULL CHECK (refused >= 1)
) STRICT, WITHOUT ROWID;

CREATE TRIGGER fences_grow BEFORE UPDATE ON fences
WHEN NEW.refused < OLD.refused OR NEW.request_id IS NOT OLD.request_id
BEGIN
	SELECT RAISE(ABORT, 'fences: what was refused stays refused');
END;

CREATE TRIGGER fences_stay BEFORE DELETE ON fences
BEGIN
	SELECT RAISE(ABORT, 'fences: never removed');
END;
