"""Two hosts of docker-compose.ray.yml on one machine: containers, each with a network of its own."""
