"""The design space: a study is one base recipe and what is varied of it; run, resumed, reported."""
