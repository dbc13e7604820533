"""The report's sections, one a module: each has `build(material)`, and `page.SECTIONS` says in what order they come."""
