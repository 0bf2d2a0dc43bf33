"""The report of a comparison: what each method's runs answered, what that says, and the pages that show it."""
