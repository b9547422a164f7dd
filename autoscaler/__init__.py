"""The autoscaler: starts and drains replicas by load and by a timetable. It runs in a container of its own."""
