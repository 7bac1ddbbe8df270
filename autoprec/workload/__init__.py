"""The user's side: functions of a file, or a transformers config."""
