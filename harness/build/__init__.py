"""From a resolved run to a worker: device, components, noise scheduler and stages."""
