"""What happened to a run that is dead: evidence is gathered once, then every diagnoser looks at it."""
