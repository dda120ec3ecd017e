"""Numbers side by side: statistics, tables, figures. Reads files only; no torch."""
