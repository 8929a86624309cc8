"""Graphs on a Spark cluster, from edges in Parquet to results in Parquet: what Fully PPR, PowerWalk's index and FastRP share there.

- `session`: a session that works, and what it must be told
- `files`: whatever file systems Spark reaches (`file:`, `hdfs:`, `s3a:`), through its own clients
- `run`: one run: its steps in Parquet beside ``out``, so that it goes on where it was stopped, and the result put in place at the end
- `edges`: edges read by Spark's readers, checked, numbered and merged, as frames

The driver plans. It sees counts, a row per partition or per hub, and the moments of columns; edges, nodes and results stay on executors.
"""
