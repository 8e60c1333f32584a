"""Everything that knows Ray: the job, its pools and groups, the store, progress, results and the CLI."""
