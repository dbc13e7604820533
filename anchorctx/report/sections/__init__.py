"""The report's sections: functions from the material to a section; `page.SECTIONS` says in what order they come."""
