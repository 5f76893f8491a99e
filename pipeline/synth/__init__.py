"""Generated behaviours with planted structure: what is relevant to a target is known, and can be asked for."""
