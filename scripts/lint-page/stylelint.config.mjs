// The style of dashboard.html: stylelint's standard, but that a rule stands on one line where it fits.
export default {
  extends: 'stylelint-config-standard',
  customSyntax: 'postcss-html',
  rules: {
    'at-rule-empty-line-before': null,
    'comment-empty-line-before': null,
    'declaration-block-single-line-max-declarations': null,
    'rule-empty-line-before': null,
    'media-feature-range-notation': 'prefix', // (width <= 680px) is unknown to Safari 16.0 to 16.3, which telephones have
  },
};
