"""Files of dino_d2, unchanged: these are links to them. In a project of your own, copy them (`cp -rL`)."""
