"""Another name for lem's direct form: `llenergymeasure.orchestration.launcher`."""
