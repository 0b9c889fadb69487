"""How a row is measured, compared, printed and drawn; every suite uses this."""
