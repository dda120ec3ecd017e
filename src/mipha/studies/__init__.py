"""The design space: a study is one base recipe and its variants; run, resumed, reported."""
