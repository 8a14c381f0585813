"""Reports: self-contained HTML pages about results, with charts as Vega-Lite specifications."""
