"""The name under which lem's direct form can be started too: `llenergymeasure.orchestration.launcher`."""
