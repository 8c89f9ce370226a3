// How the nodes look at first sight: colours of their sockets, advanced inputs folded on the classic canvas too, and the
// templates in the order of their numbers; and that what a node said stays on it.

import { api } from "../../../scripts/api.js";
import { app } from "../../../scripts/app.js";

const CATEGORY = "LLaDA2";
const LEAST_WIDTH = 240; // a node's whole title; with the 60 that nodes with widgets get beside, the whole labels too
const TEXT = "$$node-text-preview"; // the widget in which the front end shows a node's text
const COLOURS = {
  LLADA2_BACKBONE: "#6c7bff",
  LLADA2_VQ: "#00cfc8",
  LLADA2_VQ_SET: "#00979d",
  LLADA2_CHAT: "#c6e03a",
  LLADA2_SPRINT: "#d98c5f",
};

const isOurs = (nodeData) => nodeData?.category?.split("/")[0] === CATEGORY;

// A palette that names no colour for a type writes an empty one, whenever it is loaded: ours stands in for that.
function offerColours(colours) {
  for (const [type, ours] of Object.entries(COLOURS)) {
    let chosen = colours[type];
    Object.defineProperty(colours, type, {
      get: () => chosen || ours,
      set: (colour) => (chosen = colour),
      enumerable: true,
      configurable: true,
    });
  }
}

// Nodes 2.0 takes them from style variables, which a palette sets on the element itself and so overrules.
function offerStyles() {
  const style = document.createElement("style");
  const lines = Object.entries(COLOURS).map(([type, colour]) => `--color-datatype-${type}: ${colour};`);
  style.textContent = `:root { ${lines.join(" ")} }`;
  document.head.append(style);
}

// Nodes 2.0 folds what a schema calls advanced. The classic canvas folds what an extension calls so ("Show Advanced" in
// a node's menu unfolds it), and leaves a gap where it lay.
function foldAdvanced(nodeType) {
  const { computeSize, getLayoutWidgets } = nodeType.prototype;
  const linked = (node, widget) => node.inputs?.some((slot) => slot.widget?.name === widget.name && slot.link != null);
  const mark = (node) => {
    for (const widget of node.widgets ?? []) {
      if (widget.options?.advanced) widget.advanced = !linked(node, widget);
    }
  };
  nodeType.prototype.computeSize = function (...given) {
    mark(this);
    const size = computeSize.apply(this, given);
    size[0] = Math.max(size[0], LEAST_WIDTH);
    return size;
  };
  nodeType.prototype.getLayoutWidgets = function () {
    mark(this);
    return getLayoutWidgets
      .call(this)
      .filter((widget) => this.showAdvanced || !widget.options?.advanced || linked(this, widget));
  };
}

// A choice with inputs of its own gives the node its least height whenever it gets a value, when a graph is opened too.
function keepHeight(nodeType) {
  const { onConfigure } = nodeType.prototype;
  nodeType.prototype.onConfigure = function (saved) {
    onConfigure?.call(this, saved);
    if (saved.size?.[1] > this.size[1]) this.setSize([this.size[0], saved.size[1]]);
  };
}

// "3", or "10:3" for node 3 of the subgraph that is node 10.
function findNode(id) {
  let [graph, node] = [app.graph];
  for (const part of String(id).split(":")) {
    node = graph?.getNodeById(part);
    graph = node?.subgraph;
  }
  return node;
}

// Front end 1.58 takes a node's text away when the prompt has ended: an answer or a warning would be seen for a moment
// only. Each of our nodes that lost its text gets the last one again.
function keepTexts() {
  const said = new Map(); // node -> what the front end was told to show on it
  api.addEventListener("progress_text", ({ detail }) => {
    const node = findNode(detail.nodeId);
    if (isOurs(node?.constructor.nodeData)) said.set(node, detail);
  });
  const show = () => {
    for (const [node, { nodeId, text }] of said) {
      if (!node.graph) said.delete(node);
      else if (node.graph === app.canvas.graph && text.trim() && !node.widgets?.some((widget) => widget.name === TEXT))
        api.dispatchCustomEvent("progress_text", { nodeId, text });
    }
  };
  for (const end of ["execution_success", "execution_error", "execution_interrupted"])
    api.addEventListener(end, () => setTimeout(show));
}

// The server lists a pack's templates as they lie on the disk.
function sortTemplates() {
  const templates = api.getWorkflowTemplates.bind(api);
  api.getWorkflowTemplates = async () => {
    const packs = await templates();
    for (const names of Object.values(packs)) {
      if (names.every((name) => name.startsWith(CATEGORY))) names.sort();
    }
    return packs;
  };
}

app.registerExtension({
  name: "llada2mlx.Appearance",
  init: sortTemplates,
  setup() {
    offerColours(app.canvas.default_connection_color_byType);
    offerColours(app.canvas.constructor.link_type_colors);
    offerStyles();
    keepTexts();
  },
  beforeRegisterNodeDef(nodeType, nodeData) {
    if (!isOurs(nodeData)) return;
    foldAdvanced(nodeType);
    keepHeight(nodeType);
  },
});
