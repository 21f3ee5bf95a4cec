"""How a long evaluation runs: in parts that are kept, in several processes, with a bar."""
