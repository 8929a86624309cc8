"""The command line: parse, call the library, show progress and results. Starts at `anabranch.cli.main`."""
