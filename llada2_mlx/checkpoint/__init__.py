"""The files of a model: where its parts are, what its config states, how they get here from the hub."""
