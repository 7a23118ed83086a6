"""One call that turns mesa_train on in somebody else's training framework. Each loads that framework
where it is used."""
