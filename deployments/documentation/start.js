// Starts Swagger UI. Examples name the decision "id-of-the-last-answer"; requests get the id of the last answer that
// this page has received in its place.
"use strict";

const PLACEHOLDER = "id-of-the-last-answer";
let lastDecision = "";

function named(text) {
  return lastDecision ? text.replaceAll(PLACEHOLDER, lastDecision) : text;
}

if (typeof SwaggerUIBundle === "undefined") {
  document.getElementById("swagger-ui").textContent =
    "Swagger UI is not installed on this node (package fastapi-swagger). The description is at openapi.json.";
} else SwaggerUIBundle({
  url: "openapi.json",
  dom_id: "#swagger-ui",
  deepLinking: true,
  displayRequestDuration: true,
  tryItOutEnabled: true,
  defaultModelsExpandDepth: 0,
  validatorUrl: null,
  presets: [SwaggerUIBundle.presets.apis],
  layout: "BaseLayout",
  requestInterceptor: (request) => {
    request.url = named(request.url);
    if (typeof request.body === "string") {
      request.body = named(request.body);
    }
    return request;
  },
  responseInterceptor: (response) => {
    lastDecision = response.headers?.["x-router-decision-id"] || lastDecision;
    return response;
  },
});
