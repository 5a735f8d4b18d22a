-- Replicas take over each other's attempts, and undo what nobody is at: the
-- ledger decides which of the two an attempt gets.

-- When a process last took up the attempt that another had begun.
ALTER TABLE intents ADD COLUMN resumed_at INTEGER;

-- When a process said that it undoes the attempt.
ALTER TABLE intents ADD COLUMN ending_at INTEGER;

CREATE TRIGGER intents_end_for_good BEFORE UPDATE ON intents
WHEN OLD.ending_at IS NOT NULL AND (NEW.ending_at IS NOT OLD.ending_at OR NEW.resumed_at IS NOT OLD.resumed_at)
BEGIN
	SELECT RAISE(ABORT, 'intents: an attempt that is being ended stays so');
END;

CREATE TRIGGER intents_resume_forward BEFORE UPDATE ON intents
WHEN OLD.resumed_at IS NOT NULL AND (NEW.resumed_at IS NULL OR NEW.resumed_at < OLD.resumed_at)
BEGIN
	SELECT RAISE(ABORT, 'intents: when an attempt was resumed only grows');
END;
