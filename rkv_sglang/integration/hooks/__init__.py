"""Every place where the plugin meets SGLang: rows with their thin functions; table.py has all of them."""
