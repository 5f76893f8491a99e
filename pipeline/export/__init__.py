"""From a run to a folder that answers: tables, dictionaries and programs of a checkpoint, without the trainer."""
