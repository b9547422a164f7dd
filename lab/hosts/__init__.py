"""Several hosts on one machine: network namespaces with cables between them, and the fault table over them."""
