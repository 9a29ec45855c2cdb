"""How the service is run: deployment data, and `deploy.local`, which starts what it needs on one machine."""
