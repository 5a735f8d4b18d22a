-- Replicas take over each other's attempts, and undo what nobody is at: the
-- ledger decides which of the two an attempt gets.

-- When a process last took up the attempt that another had begun.
ALTER TABLE intents ADD COLUMN resumed_at BIGINT;

-- When a process said that it undoes the attempt.
ALTER TABLE intents ADD COLUMN ending_at BIGINT;

CREATE FUNCTION ledger_endings() RETURNS TRIGGER LANGUAGE plpgsql
SET search_path FROM CURRENT AS $$
BEGIN
	IF OLD.ending_at IS NOT NULL AND (NEW.ending_at, NEW.resumed_at) IS DISTINCT FROM (OLD.ending_at, OLD.resumed_at) THEN
		PERFORM ledger_refuse('intents: an attempt that is being ended stays so');
	END IF;
	IF OLD.resumed_at IS NOT NULL AND (NEW.resumed_at IS NULL OR NEW.resumed_at < OLD.resumed_at) THEN
		PERFORM ledger_refuse('intents: when an attempt was resumed only grows');
	END IF;
	RETURN NEW;
END $$;

-- After intents_laws, which takes the lock: triggers run in the order of their
-- names.
CREATE TRIGGER intents_laws_of_endings BEFORE UPDATE ON intents FOR EACH ROW EXECUTE FUNCTION ledger_endings();
