"""What tests share: contract suites to inherit, tolerances, NaN-poisoned memory, tiny specs. Imported by tests only."""
