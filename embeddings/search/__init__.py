"""Search: which K behaviours of a history matter to a target."""
