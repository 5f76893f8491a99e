"""What data and settings look like: Arrow schemas, the manifest, typed settings. Imports none of the other packages."""
