// The script of dashboard.html: what ESLint recommends, and rules that find mistakes.
import js from '@eslint/js';
import html from 'eslint-plugin-html';
import globals from 'globals';

export default [
  js.configs.recommended,
  {
    files: ['**/*.html'],
    plugins: {html},
    linterOptions: {reportUnusedDisableDirectives: 'error'},
    languageOptions: {ecmaVersion: 2022, sourceType: 'script', globals: globals.browser},
    rules: {
      'array-callback-return': 'error',
      'consistent-return': 'error',
      'eqeqeq': 'error',
      'no-implied-eval': 'error',
      'no-control-regex': 'off',
      'no-eval': 'error',
      'no-new-func': 'error',
      'no-script-url': 'error',
      'no-shadow': 'error',
      'no-template-curly-in-string': 'error',
      'no-unused-vars': ['error', {args: 'all'}],
      'no-var': 'error',
      'object-shorthand': 'error',
      'prefer-const': ['error', {destructuring: 'all'}],
      'strict': ['error', 'global'],
    },
  },
];
