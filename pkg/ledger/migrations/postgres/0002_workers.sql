-- Which processes work, and when each said so last: what a sweep that runs by
-- itself goes by before it takes an unfinished attempt for an abandoned one.
CREATE TABLE workers (
	backend TEXT   NOT NULL,
	process TEXT   NOT NULL,
	seen_at BIGINT NOT NULL,
	PRIMARY KEY (backend, process)
);
