// Starts Swagger UI on /docs; a file of its own, since the policy of that page lets no script inside a page run.

const place = document.getElementById("swagger-ui");

window.SwaggerUIBundle({
  url: place.dataset.description,
  domNode: place,
  deepLinking: true,
  showExtensions: true,
  showCommonExtensions: true,
  validatorUrl: null, // its badge comes from a server elsewhere
});
