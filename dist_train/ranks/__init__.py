"""Communication between processes: ranks of a run, their vote at each step, and what may end them from outside."""
